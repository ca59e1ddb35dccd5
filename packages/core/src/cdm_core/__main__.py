"""`python -m cdm_core`, the form that `torchrun -m` and `accelerate launch -m` need."""

from cdm_core.cli import main

main()
