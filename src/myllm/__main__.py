"""`python -m myllm`."""

from myllm.cli.main import main

if __name__ == "__main__":
    main()
