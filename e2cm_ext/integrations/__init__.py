"""Networks with early exits in serving and batch engines. Each module needs the engine that it is named after."""
