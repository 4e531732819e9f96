"""The command `sddns`: one module for each subcommand; `main` picks the module and runs it."""
