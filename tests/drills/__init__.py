"""Failure drills: something breaks while traffic runs, and nothing goes out in plaintext."""
