"""Nothing here is a test of this suite: see ``__init__.py`` for how it is run."""

collect_ignore_glob = ["*.py"]
