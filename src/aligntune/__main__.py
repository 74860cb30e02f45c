"""`python -m aligntune`: the command, for those whose shell does not find it."""

from aligntune.cli.main import main

main()
