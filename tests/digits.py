"""The digits tier of examples/make_digits.py, for tests: trained once, kept in pytest's cache."""

from examples.make_digits import CHANGES, CONFIG, FACTORY, DigitsTier, digits_cnn, digits_tier

__all__ = ["CHANGES", "CONFIG", "FACTORY", "DigitsTier", "digits_cnn", "digits_tier"]
