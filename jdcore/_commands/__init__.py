"""One module per command of ``jdcore``: ``add_parser`` declares it, ``run`` gives its exit code."""
