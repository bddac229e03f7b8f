-- Makes a rank a member of a run; a new run_id makes a new generation and moves the head to its position.
-- KEYS: head, claims, finished, epochs, pins, plan (of the head as the caller read it), runs
-- ARGV: uid, epoch, state, plan_id, generation (of the head as the caller read it),
--       run_id, rank, world_size, straggler_timeout_ms (0: none),
--       position ('epoch step', never an epoch's end), whether it was given, target epoch and step (the same as it is seen
--       from the head), generation and claim of who joins again ('' if nobody does), process_id ('' if none),
--       claim of the rank's latest process as the caller read it ('' if none),
--       plan of the target epoch and the spec that it was made with ('' if samples were never added)
-- Returns {'joined', generation, claim} or {what is wrong, ...}.
local h = redis.call('HMGET', KEYS[1], 'uid', 'epoch', 'state', 'plan_id', 'generation', 'run_id', 'world_size',
  'run_position', 'straggler_timeout_ms')
if h[1] ~= ARGV[1] then
  return {'gone'}
end
for i = 2, 5 do
  if h[i] ~= ARGV[i] then
    return {'changed'}
  end
end
local run_id, rank, world_size, straggler_timeout_ms = ARGV[6], ARGV[7], ARGV[8], ARGV[9]
local position, is_given, target_epoch, target_step = ARGV[10], ARGV[11] == '1', ARGV[12], ARGV[13]
local old_generation, old_claim, process = tonumber(ARGV[14]), tonumber(ARGV[15]), ARGV[16]
local is_known = h[6] == run_id

-- Who has been here and is not the latest any more does not come back: not even as a request that was delayed.
local stored_claim = is_known and redis.call('HGET', KEYS[2], rank)
if is_known then
  local process_claim = process ~= '' and redis.call('HGET', KEYS[2], 'process:' .. process)
  if process_claim and process_claim == stored_claim then
    return {'joined', h[5], stored_claim}
  end
  if process_claim or (old_generation and stored_claim and tonumber(stored_claim) > old_claim) then
    return {'superseded'}
  end
  if (stored_claim or '') ~= ARGV[17] then -- another process of the rank has joined since this one asked
    return {'changed'}
  end
elseif redis.call('HEXISTS', KEYS[7], run_id) == 1 or (old_generation and old_generation <= tonumber(h[5])) then
  return {'superseded'}
end

-- By the clock, so that a claim that the store has lost is not given out again; and in any case a larger one.
local now = redis.call('TIME')
local claim = math.max(now[1] * 1000000 + now[2], (tonumber(stored_claim or nil) or 0) + 1, (old_claim or 0) + 1)
claim = string.format('%.0f', claim)
local function take_place()
  redis.call('HSET', KEYS[2], rank, claim)
  if process ~= '' then
    redis.call('HSET', KEYS[2], 'process:' .. process, claim)
  end
end

if is_known then
  if h[7] ~= world_size then
    return {'world_size', h[7]}
  end
  if h[9] ~= straggler_timeout_ms then
    return {'straggler_timeout_ms', h[9]}
  end
  if is_given and position ~= h[8] and not old_generation then
    return {'position', h[8]}
  end
  take_place()
  if h[3] == 'open' then
    redis.call('SETBIT', KEYS[3], rank, 0) -- what its earlier process had finished, this one begins again
    if redis.call('BITCOUNT', KEYS[3]) == 0 then
      redis.call('HSET', KEYS[1], 'finish_began_ms', 0)
    end
  end
  return {'joined', h[5], claim}
end

local generation = math.max(h[5] + 1, old_generation or 0)
if tonumber(target_epoch) < tonumber(h[2]) then
  local plan_id = redis.call('HGET', KEYS[4], target_epoch)
  if not plan_id then
    return {'not_retained'}
  end
  if plan_id ~= ARGV[18] then
    return {'changed'}
  end
  if ARGV[19] ~= '' then
    redis.call('HSET', KEYS[1], 'spec', ARGV[19])
  end
  for _, epoch in ipairs(redis.call('HKEYS', KEYS[4])) do
    if tonumber(epoch) > tonumber(target_epoch) then
      redis.call('HDEL', KEYS[4], epoch)
    end
  end
  local pins = redis.call('HGETALL', KEYS[5])
  for i = 1, #pins, 2 do
    if tonumber(pins[i + 1]) > tonumber(target_epoch) then
      redis.call('HDEL', KEYS[5], pins[i])
    end
  end
  redis.call('HSET', KEYS[1], 'epoch', target_epoch, 'plan_id', plan_id, 'state', 'unplanned')
elseif h[3] == 'open' then
  redis.call('HSET', KEYS[6], string.format('generation:%.0f', generation), world_size .. ' ' .. target_step)
end
generation = string.format('%.0f', generation)
redis.call('HSET', KEYS[1], 'generation', generation, 'run_id', run_id, 'world_size', world_size,
  'run_position', position, 'first_step', target_step,
  'straggler_timeout_ms', straggler_timeout_ms, 'finish_began_ms', 0)
redis.call('HSET', KEYS[7], run_id, generation)
redis.call('DEL', KEYS[2], KEYS[3])
take_place()
return {'joined', generation, claim}
