"""`python -m sopdeploy`: the command line, where the `sopdeploy` script is not on the path."""

from sopdeploy.cli.app import main

main()
