// Row kernels on the pool.
#include "chunks.h"
#include "dispatch.h"

namespace jnorm {

int64_t row_scratch(Type t, int64_t R) {
  const int64_t n = padded(R, lanes(t)) + 3 * lanes(t), size = is_double(t) ? 8 : 4;
  return kRowScratch * n * size;
}

namespace {

// The rows that take one row of scale and bias, as chunks.
struct Rows {
  int64_t G, each, rows, chunks_of_g;
  Rows(const Row& in) : G(std::max<int64_t>(in.G, 1)), each(in.O / G) {
    const int64_t bytes = std::max<int64_t>(in.R * size_of(in.x.type), 1);
    rows = std::max({kChunkBytes / bytes, kRowBlock, (in.O + kMostChunks - 1) / kMostChunks});
    if (rows * kWantedChunks > in.O) rows = std::max<int64_t>((in.O + kWantedChunks - 1) / kWantedChunks, std::min<int64_t>(kRowBlock, 8));
    if (in.O * bytes <= kSerialBytes) rows = std::max<int64_t>(each, 1);
    chunks_of_g = (each + rows - 1) / rows;
  }
  int64_t chunks() const { return G * chunks_of_g; }
  void place(int64_t i, RowChunk& c) const {
    c.g = i / chunks_of_g;
    c.first = (i % chunks_of_g) * rows;
    c.last = std::min(c.first + rows, each);
  }
};

// As for columns.
bool streams(const Row& in, Array out, int64_t bytes_in = 0) {
  return in.O * in.R * size_of(out.type) + bytes_in >= last_cache_bytes() && aligned(out) && in.R % 32 == 0;
}

template <class A> void cotangent(const Leaf& leaf, Pool& pool, const Row& in, RowChunk c, A* dscale, A* dbias) {
  const Rows rows(in);
  std::vector<Wide<A>> sums(rows.chunks() * 2 * in.R);
  pool.run(rows.chunks(), [&](int64_t i) {
    const Scratch scratch(row_scratch(in.x.type, in.R));
    RowChunk own = c;
    rows.place(i, own);
    own.scratch = scratch.get();
    own.dscale = sums.data() + i * 2 * in.R;
    own.dbias = sums.data() + (i * 2 + 1) * in.R;
    leaf.row_cotangent(in, own);
  });
  // Columns are independent, and their chunks are added in order.
  const int64_t tile = 512, tiles = (in.R + tile - 1) / tile;
  pool.run(rows.G * tiles, [&](int64_t k) {
    const int64_t g = k / tiles, from = k % tiles * tile, to = std::min(from + tile, in.R);
    Wide<A> total[2][tile] = {};
    for (int64_t i = g * rows.chunks_of_g; i < (g + 1) * rows.chunks_of_g; i++) {
      for (int which = 0; which < 2; which++) {
        const Wide<A>* const part = sums.data() + (i * 2 + which) * in.R;
        for (int64_t j = from; j < to; j++) total[which][j - from] += part[j];
      }
    }
    for (int64_t j = from; j < to; j++) {
      dscale[g * in.R + j] = A(total[0][j - from]);
      dbias[g * in.R + j] = A(total[1][j - from]);
    }
  });
}

}  // namespace

void row_norm(Isa isa, Pool& pool, const Row& in, double epsilon, Array residual, Array y, Array sum, const RowStats& stats) {
  const Leaf& leaf = leaf_of(isa);
  const Rows rows(in);
  RowChunk c{};
  c.epsilon = epsilon;
  c.residual = residual;
  c.y = y;
  c.sum = sum;
  c.stats = stats;
  c.stream = streams(in, y);
  pool.run(rows.chunks(), [&](int64_t i) {
    const Scratch scratch(row_scratch(in.x.type, in.R));
    RowChunk own = c;
    rows.place(i, own);
    own.scratch = scratch.get();
    leaf.row_norm(in, own);
  });
}

void row_cotangent(Isa isa, Pool& pool, const Row& in, const RowStats& stats, Array dy, Array dsum, Array dx, void* dscale, void* dbias) {
  RowChunk c{};
  c.dy = dy;
  c.dsum = dsum;
  c.dx = dx;
  c.stats = stats;
  c.stream = streams(in, dx, in.O * in.R * (size_of(in.x.type) + size_of(dy.type)));
  if (is_double(in.x.type)) {
    cotangent<double>(leaf_of(isa), pool, in, c, static_cast<double*>(dscale), static_cast<double*>(dbias));
  } else {
    cotangent<float>(leaf_of(isa), pool, in, c, static_cast<float*>(dscale), static_cast<float*>(dbias));
  }
}

}  // namespace jnorm
