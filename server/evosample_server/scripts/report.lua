-- Writes losses of one rank and what comes with them, if they belong to the epoch that is open and come from its latest process.
-- KEYS: head, claims, progress, block of a column, ...
-- ARGV: uid, plan_id, generation, rank, claim, step after the last, mean loss ('' if none), then per block: its size, offset, bytes
-- Returns 'ok', 'gone', 'superseded', 'behind' or 'closed'.
local h = redis.call('HMGET', KEYS[1], 'uid', 'plan_id', 'state', 'generation', 'epoch')
if h[1] ~= ARGV[1] then
  return 'gone'
end
local refused = refusal(h[4], redis.call('HGET', KEYS[2], ARGV[4]), ARGV[3], ARGV[5])
if refused then
  return refused
end
if h[2] ~= ARGV[2] or h[3] ~= 'open' then
  return 'closed'
end
for block = 4, #KEYS do
  local size, offset, bytes = ARGV[3 * block - 4], ARGV[3 * block - 3], ARGV[3 * block - 2]
  if redis.call('EXISTS', KEYS[block]) == 0 then
    redis.call('SETRANGE', KEYS[block], size - 1, '\0') -- all of it at once: a string that grows takes up to twice its size
  end
  redis.call('SETRANGE', KEYS[block], offset, bytes)
end

-- For people to look at: how far the rank is. What is sent again does not set it back.
local step, at = tonumber(ARGV[6]), ARGV[3] .. ' ' .. h[5]
local before = redis.call('HGET', KEYS[3], ARGV[4])
if before and string.sub(before, 1, #at + 1) == at .. ' ' then
  step = math.max(step, tonumber(string.match(before, '^%d+', #at + 2)))
end
local now = redis.call('TIME')
redis.call('HSET', KEYS[3], ARGV[4], string.format('%s %.0f %.0f %s', at, step, now[1] * 1000 + math.floor(now[2] / 1000),
  ARGV[7]))
return 'ok'
