"""Small C++ pieces, built once by the local compiler."""
