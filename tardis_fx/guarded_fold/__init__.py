"""The fit of the guarded fold: guards, ranges, budget, drafts, widths, residuals."""
