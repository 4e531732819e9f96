"""The command `sddns`: `main` finds the command that was asked for, each of which is a module."""
