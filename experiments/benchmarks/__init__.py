"""Speed, one question a module, each a command (`python -m experiments.benchmarks.NAME`):

    engine, kernels, gemm, library_gemm    the GPU: a whole engine, its kernels, launches for the tables of products
    mapping, swaps                         the GPU's memory: mapped pages, blocks to the host and back
    cpu, scheduler, simulator              the host: beside transformers, a step's scheduling, simulated requests
    served, front, stream_load, soak       the server: what serving costs, the front alone, its load, hours of it

`attention_cases`, `attention_variants` and `fused_cases` are what `kernels` measures; `engine_checks` and
`engine_profile` are sections of `engine`.
"""
