from native_fixtures import cxx_compiler, native_library, plain_build

__all__ = ["cxx_compiler", "native_library", "plain_build"]
