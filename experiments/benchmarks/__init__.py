"""Speed, one question a module, each a command (`kvarena benchmark NAME`):

    engine, kernels, gemm, library_gemm    the GPU: a whole engine, its kernels, launches for the tables of products
    hopper, layer_gemm                     the GPU: the CUDA kernels for Hopper beside what they replace; their tables
    draw                                   the GPU: a step's tokens, whatever the requests filter
    mapping, swaps                         the GPU's memory: mapped pages, blocks to the host and back
    recording, first_token                 a run: what recording costs it, and its start up to the first token
    cpu, scheduler, simulator              the host: beside transformers, a step's scheduling, simulated requests
    probe                                  the host: how noisy the probe of a measured run is
    served, front, stream_load, soak       the server: what serving costs, the front alone, its load, hours of it
    under_attack                           the server: honest streams beside requests that mean harm
    fairness                               the server: a client beside one that floods, under each scheduler

`attention_cases`, `attention_variants` and `fused_cases` are what `kernels` measures; `engine_checks` and
`engine_profile` are sections of `engine`.
"""
