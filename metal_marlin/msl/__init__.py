"""Metal Shading Language through clang: reflection, rewriting, entries and compilation."""
