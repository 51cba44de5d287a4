"""The entry point `torch-cpu-ext`."""

import sys


def main() -> None:
    """Runs the command line; says what to install if its packages are missing."""
    try:
        from .app import app
    except ImportError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        sys.exit(f"torch-cpu-ext needs {error.name}, which is not installed:\n  pip install 'torch_cpu_ext[cli]'")
    app(prog_name="torch-cpu-ext")


if __name__ == "__main__":
    main()
