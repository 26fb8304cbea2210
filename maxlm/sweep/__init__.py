"""Many short runs of one configuration: which settings are best, and what a larger model would reach."""
