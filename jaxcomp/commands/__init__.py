"""The commands, one a file, which `jaxcomp.cli` puts together."""
