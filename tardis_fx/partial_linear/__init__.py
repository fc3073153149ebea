"""The fit of partial linearity: guards, ranges, budget, drafts, widths, residuals."""
