from native_fixtures import cxx_compiler, native_library

__all__ = ["cxx_compiler", "native_library"]
