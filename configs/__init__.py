"""The bundled configs, as package data."""
