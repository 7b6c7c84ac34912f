"""Two streams through plain code: each torch call gives its clean result as ever, and the difference of the second stream beside it."""
