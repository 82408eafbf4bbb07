"""What normalization costs, against every other implementation: `python -m benchmarks --help`.

Only ratios of one run are claimed. Everything that is timed has been compared with float64 first; the rounds of all that is compared are
interleaved; and where jnorm is slower the report says so as plainly as where it is faster.
"""
