"""The command line, installed as `moe_compose_cli`: reads arguments, calls the library, and hands
the result to `output`, the one module that prints.
"""
