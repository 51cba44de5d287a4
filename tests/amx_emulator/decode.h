// AMX instructions from their bytes; pure functions, no state.
//
// All are VEX-encoded: C4 | ~R ~X ~B 00010 | W=0 ~vvvv L=0 pp | opcode | ModRM | [SIB] | [displacement]. Encodings are those of the Intel
// SDM, volume 2, and were compared with what the GNU assembler 2.40 writes.
#pragma once

#include <cstdint>
#include <cstring>

namespace amx_emulator {

enum class Op : int {
  ldtilecfg,
  sttilecfg,
  tilerelease,
  tilezero,
  tileloadd,
  tileloaddt1,
  tilestored,
  tdpbf16ps,
  tdpfp16ps,
  tdpbssd,
  tdpbsud,
  tdpbusd,
  tdpbuud,
};
constexpr int kOps = 13;
constexpr const char* kNames[kOps] = {"ldtilecfg", "sttilecfg", "tilerelease", "tilezero", "tileloadd", "tileloaddt1", "tilestored",
                                      "tdpbf16ps", "tdpfp16ps", "tdpbssd",     "tdpbsud",  "tdpbusd",   "tdpbuud"};

constexpr int kNone = -1, kRip = 16;  // beside the numbers of the 16 general registers

struct Instruction {
  Op op;
  int length;       // bytes
  int d, a, b;      // tiles: destination (of a store: the source), first and second factor
  int base, index;  // registers, or kNone; the base may be kRip
  int shift;        // of the index
  int64_t displacement;

  // In front of the index; `registers` in the order of their numbers, `next` is the address of the next instruction.
  uint64_t address(const uint64_t* registers, uint64_t next) const {
    const uint64_t from = base == kNone ? 0 : base == kRip ? next : registers[base];
    return from + static_cast<uint64_t>(displacement);
  }
  // What the index adds: an address in ldtilecfg and sttilecfg, the bytes from row to row elsewhere.
  int64_t stride(const uint64_t* registers) const { return index == kNone ? 0 : static_cast<int64_t>(registers[index] << shift); }
};

// Decodes the instruction at `bytes`, reading no byte behind it. False if it is none of AMX, or one that #UDs by its encoding alone.
inline bool decode(const uint8_t* bytes, Instruction& out) {
  if (bytes[0] != 0xc4 || (bytes[1] & 0x9f) != 0x82 || (bytes[2] & 0x84) != 0) return false;
  const int x = bytes[1] & 0x40 ? 0 : 8, b = bytes[1] & 0x20 ? 0 : 8, vvvv = bytes[2] >> 3 & 15, pp = bytes[2] & 3;
  const int opcode = bytes[3], modrm = bytes[4], mod = modrm >> 6, reg = modrm >> 3 & 7, rm = modrm & 7;
  const bool registers = mod == 3 && x == 0 && b == 0, memory = mod != 3;
  out = {Op::ldtilecfg, 5, 0, 0, 0, kNone, kNone, 0, 0};

  if (opcode == 0x5c || opcode == 0x5e) {
    constexpr Op floats[] = {Op::tdpbf16ps, Op::tdpfp16ps}, integers[] = {Op::tdpbuud, Op::tdpbusd, Op::tdpbsud, Op::tdpbssd};
    if (!registers || vvvv < 8 || (opcode == 0x5c && pp < 2)) return false;
    out.op = opcode == 0x5c ? floats[pp - 2] : integers[pp];
    out.d = reg;
    out.a = rm;
    out.b = ~vvvv & 7;
    return true;
  }
  if (vvvv != 15) return false;
  if (opcode == 0x49 && pp == 0 && registers && modrm == 0xc0) {
    out.op = Op::tilerelease;
    return true;
  }
  if (opcode == 0x49 && pp == 3 && registers && rm == 0) {
    out.op = Op::tilezero;
    out.d = reg;
    return true;
  }
  if (!memory) return false;
  if (opcode == 0x49 && pp < 2 && reg == 0) {
    out.op = pp == 0 ? Op::ldtilecfg : Op::sttilecfg;
  } else if (opcode == 0x4b && pp > 0 && rm == 4) {
    out.op = pp == 3 ? Op::tileloadd : pp == 1 ? Op::tileloaddt1 : Op::tilestored;
    out.d = reg;
  } else {
    return false;
  }

  int at = 5;
  bool wide = mod == 2;  // a displacement of four bytes
  out.base = rm | b;
  if (rm == 4) {
    const int sib = bytes[at++], index = (sib >> 3 & 7) | x;
    out.shift = sib >> 6;
    out.index = index == 4 ? kNone : index;
    out.base = (sib & 7) | b;
    if (mod == 0 && (sib & 7) == 5) {
      out.base = kNone;
      wide = true;
    }
  } else if (mod == 0 && rm == 5) {
    out.base = kRip;
    wide = true;
  }
  if (wide) {
    int32_t displacement;
    std::memcpy(&displacement, bytes + at, 4);
    out.displacement = displacement;
    at += 4;
  } else if (mod == 1) {
    out.displacement = static_cast<int8_t>(bytes[at++]);
  }
  out.length = at;
  return true;
}

}  // namespace amx_emulator
