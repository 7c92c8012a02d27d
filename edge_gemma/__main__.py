"""`python -m edge_gemma` is `edge-gemma`."""

from edge_gemma.cli.main import main

main()
