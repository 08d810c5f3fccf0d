"""`python -m moe_compose_cli`, for `torchrun` and for environments without the script."""

from .main import main

main()
