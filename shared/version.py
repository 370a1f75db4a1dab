"""Which Darkroom this is: said in its documents, its metrics and its pictures."""

VERSION = "0.1.0"
