"""`python -m corda_lora.cli`."""

from . import main

if __name__ == "__main__":
    main()
