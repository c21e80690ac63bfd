"""The paper's claims as experiments: recipes, their results, and what follows from them."""
