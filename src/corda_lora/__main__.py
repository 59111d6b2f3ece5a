"""`python -m corda_lora VERB`, and `torchrun -m corda_lora VERB`: the command `corda`."""

from .cli import main

if __name__ == "__main__":
    main()
