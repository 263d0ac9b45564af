"""The programs: absl flags, then one call. Never imported by the library."""
