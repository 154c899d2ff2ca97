"""Wrong inputs as tables: a row says what is passed and what has to be said about it."""
