"""What the tests are run on: small networks, models, graphs and plans."""
