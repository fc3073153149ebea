"""The fit of partial linearity: codes, precision, influence."""
