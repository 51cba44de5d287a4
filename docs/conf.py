"""Sphinx settings. `make docs` builds with warnings as errors."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch_cpu_ext

project = "torch_cpu_ext"
author = "The torch_cpu_ext authors"
copyright = "The torch_cpu_ext authors"
version = release = torch_cpu_ext.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "benchmark_table", "benchmark_plot", "op_catalogue"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["deflist"]
myst_heading_anchors = 3

default_role = "py:obj"  # docstrings name other functions in single backquotes
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_use_unqualified_type_names = True

html_theme = "furo"
html_title = f"torch_cpu_ext {release}"
html_show_sphinx = False
