"""``python -m torch_cpu_ext`` is `torch-cpu-ext`, for where scripts are not on the path."""

from .cli.__main__ import main

if __name__ == "__main__":
    main()
