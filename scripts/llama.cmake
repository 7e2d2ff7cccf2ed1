# Read by llama-cpp-python's build at its project() call: what of llama.cpp is left out.
# Plain variables here win over its options and over what it forces into the cache.

# Chat helpers, argument parsing and an HTTP client for llama.cpp's own programs: more than half of the
# build, and nothing that the Python bindings load.
set(LLAMA_BUILD_COMMON OFF)
set(LLAMA_OPENSSL OFF)

# Pictures and sound.
set(LLAVA_BUILD OFF)

set(LLAMA_BUILD_TESTS OFF)
set(LLAMA_BUILD_EXAMPLES OFF)
set(LLAMA_BUILD_TOOLS OFF)
set(LLAMA_BUILD_SERVER OFF)
set(LLAMA_BUILD_APP OFF)
