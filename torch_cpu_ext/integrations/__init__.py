"""Thin bridges to other packages; each imports its package only when used."""
