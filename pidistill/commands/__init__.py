"""Hold the `pidistill` command line: one module or folder per command."""
