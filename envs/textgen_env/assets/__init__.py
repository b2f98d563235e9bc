"""The embedded task: a grammar of short reviews, and the models and prompts that `build` makes from it."""
