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

# llama.cpp's code for AMX, which -march=native brings in, ends the process with SIGSEGV on CPUs that have it: with
# GCC 12 and older a tile's configuration is loaded before it is written, and of the threads only the first asks the
# kernel for leave (llama.cpp's issue 20824 and pull request 26954). Without it AVX-512 does the same work.
include(CheckCXXCompilerFlag)
check_cxx_compiler_flag(-mno-amx-tile COMPILER_KNOWS_AMX)
if(COMPILER_KNOWS_AMX)
    # For C and C++ alone: nvcc refuses options that it does not know, and a build for CUDA would end here.
    add_compile_options("$<$<COMPILE_LANGUAGE:C,CXX>:-mno-amx-tile;-mno-amx-int8;-mno-amx-bf16>")
endif()
