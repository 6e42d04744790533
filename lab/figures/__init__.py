"""The paper's figures: each function takes rows and gives a drawing and the table behind it."""
