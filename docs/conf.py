"""How Sphinx builds the documentation: `python -m sphinx -W docs docs/_build`."""

from importlib.metadata import version as installed_version

project = "customized-models"
author = "The customized-models authors"
version = release = installed_version(project)

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_nb"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = project

# Markdown pages, and the notebook with the outputs that are stored in it
myst_heading_anchors = 3
nb_execution_mode = "off"  # the test suite runs it

# Docstrings: Google's sections, and single backquotes for code as in Markdown.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = [("Source", "params_style"), "Law", "Yields"]
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_class_signature = "mixed"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
