// Runs every kernel, on every instruction set that this machine has and with one to eight threads that claim the tasks in random order,
// over shapes, storage types, masks, activations, residuals and non-finite values. Results are compared with reference.h for one thread,
// and bitwise with those of one thread for more; bytes around what is written are watched. Meant for builds with sanitizers:
//
//     cmake -S native -B build/tsan -DJNORM_SANITIZE=thread && cmake --build build/tsan --target driver && build/tsan/driver [SEED [STEP]]
//
// With a step one case in so many is run; which ones depends on the seed.
#include "columns.h"
#include "rows.h"

using namespace driver;

int main(int argc, char** argv) {
  const uint64_t seed = argc > 1 ? std::strtoull(argv[1], nullptr, 10) : 0, step = argc > 2 ? std::strtoull(argv[2], nullptr, 10) : 1;
  uint64_t number = seed;
  Random random(seed);
  for (int64_t C : {0, 1, 3, 17, 64, 100, 1024}) {
    for (int64_t R : {0, 1, 2, 7, 64, 129, 300, 2500}) {
      for (Type type : {Type::f32, Type::f64, Type::bf16, Type::f16}) {
        if (number++ % step) continue;
        const int64_t O = R * C > 60000 ? 1 : one_of<int64_t>(random, {0, 1, 2, 3, 5});
        const Shape shape{O, std::min<int64_t>(R, 150000 / std::max<int64_t>(1, C)), C};
        test_columns(random, shape, type);
        test_group(random, shape, type);
        // Rows take the channels as their length.
        test_rows(random, {std::min<int64_t>(R, 40000 / std::max<int64_t>(1, C)), C, 1}, type);
      }
    }
  }
  for (Type type : {Type::f32, Type::f64, Type::bf16, Type::f16}) test_rows(random, {3, 4096, 1}, type);
  std::printf("seed %llu: %lld runs, %d failures\n", static_cast<unsigned long long>(seed), static_cast<long long>(runs), failures);
  return failures != 0;
}
