"""Networks with early exits in other people's engines. Each file needs the engine it is named after."""
