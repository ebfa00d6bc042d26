// Copies between addresses on one device, all in one launch: block (x, y) takes its share of copy number y.
//
// The driver compiles copies.ptx, which `nvcc -ptx -arch=compute_75 -O3 copies.cu` makes of this file.

struct Copy {
  char* target;
  const char* source;
  unsigned long long bytes;
};

struct Copies {
  Copy all[32];
};

// Copies the whole words from byte number `done` on; where the next byte is.
template <typename Word>
__device__ unsigned long long copy_words(const Copy& one, unsigned long long done) {
  const unsigned long long step = gridDim.x * (unsigned long long)blockDim.x, end = one.bytes / sizeof(Word);
  for (unsigned long long i = done / sizeof(Word) + blockIdx.x * (unsigned long long)blockDim.x + threadIdx.x; i < end; i += step)
    reinterpret_cast<Word*>(one.target)[i] = reinterpret_cast<const Word*>(one.source)[i];
  return end * sizeof(Word);
}

extern "C" __global__ void fxopt_copies(const __grid_constant__ Copies copies) {
  const Copy one = copies.all[blockIdx.y];
  const unsigned long long both = (unsigned long long)one.target | (unsigned long long)one.source;
  unsigned long long done = 0;
  if ((both & 15) == 0)
    done = copy_words<uint4>(one, done);
  else if ((both & 3) == 0)
    done = copy_words<unsigned>(one, done);
  else if ((both & 1) == 0)
    done = copy_words<unsigned short>(one, done);
  copy_words<char>(one, done);
}
