"""The paper's findings in miniature: what it says of starts, coefficients, layers and variants, measured again here."""
