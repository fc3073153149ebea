"""How partial linearity is fitted: neurons, guards, budget, drafts, residuals."""
