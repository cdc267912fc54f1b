#pragma once

#include <chrono>
#include <functional>
#include <memory>
#include <vector>

#include "deep_ep/buffer.hpp"
#include "program.hpp"

// How the ranks of a Program, threads of this process with a Buffer each, are let run.
namespace deep_ep::sim {

using Buffers = std::vector<std::unique_ptr<Buffer>>;

/// body(i) on `count` threads at once.
void on_threads(int count, const std::function<void(int)>& body);

/// Under a scheduler time is counted in turns, a thousand a millisecond.
void count_time_in_turns(const Buffers& buffers, std::chrono::milliseconds timeout);

/// One rank awake at a time, in an order that follows from the seed: expects what the reference
/// gives. (A Buffer that is destroyed is lost to the others, so all have ended before one is.)
void play_in_turns(const Program& program, const Buffers& buffers, std::uint64_t seed);

/// No scheduler: what a race detector looks at.
void play_freely(const Program& program, const Buffers& buffers);

/// The same over and over while `stopped` stops for good at one of its first `points` points:
/// expects that all others fail by the timeout and can do no more, and that one at least names it.
void play_until_stopped(const Program& program, const Buffers& buffers, std::uint64_t seed,
                        int stopped, int points);

}  // namespace deep_ep::sim
