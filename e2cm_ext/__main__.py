"""`python -m e2cm_ext`, where no `e2cm` is on the path."""

from .cli import main

if __name__ == "__main__":
    main(prog_name="e2cm")
